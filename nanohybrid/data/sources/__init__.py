"""Where documents come from. A source yields documents one by one and keeps nothing."""
