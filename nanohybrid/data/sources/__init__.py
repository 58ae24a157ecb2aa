"""Sources of documents. A source yields documents one by one and stores none."""
