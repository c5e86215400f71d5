"""`python -m router_service` is `router-service`."""

from router_service.cli import main

main()
