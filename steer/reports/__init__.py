"""Reports for people: HTML pages, curves and pictures."""
