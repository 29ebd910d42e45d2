"""Zero-cost proxies: one file each, saying what it needs captured and how that is reduced."""
