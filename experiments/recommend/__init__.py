"""What clocks, how many instances, and whether dynamic control pays: the search and its page."""
