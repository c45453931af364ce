"""What a report on runs is made of: what is read, its tables, its curves and its page."""
