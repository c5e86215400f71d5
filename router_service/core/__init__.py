"""What the service does with a request, without HTTP: admission, cache, decision, strategy, ledger."""
