"""What was done and why: text, JSON, Markdown, SARIF, HTML."""
