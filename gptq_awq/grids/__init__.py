"""Number formats: where weights may land."""
