"""Statistics of figures measured on the same items: paired differences, slopes over strengths, verdicts."""
