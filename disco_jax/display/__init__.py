"""What people see: terminal and plots."""
