"""Reports for people: HTML pages, loss curves and plots."""
