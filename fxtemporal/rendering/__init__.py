"""A report for people and for programs: as text, Markdown, SARIF and a page of HTML."""
