"""One file a paper: each a page of composition over the parts below."""
