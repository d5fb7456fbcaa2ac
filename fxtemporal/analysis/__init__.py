"""What is found out about a program; nothing here changes it."""
