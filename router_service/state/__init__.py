"""What replicas share, in Redis: limits and budgets, cache, sessions, the ledger with feedback, the routers in use."""
