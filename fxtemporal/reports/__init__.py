"""Reports on rewrites and their reasons, as text, JSON, Markdown, SARIF and HTML."""
