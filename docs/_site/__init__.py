"""What the documentation site needs to be built: nothing here is a page, and nothing is shipped."""
