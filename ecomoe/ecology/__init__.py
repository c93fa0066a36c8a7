"""Reading the ecology of experts: statistics, categories, events and the monitor."""
