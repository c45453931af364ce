"""Terminal output and plots."""
