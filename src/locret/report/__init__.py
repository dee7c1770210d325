"""Results as pages: one HTML file that needs no network, and Markdown."""
