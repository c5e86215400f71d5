"""The service on Ray Serve: one application for the ingress, one for each group of experts that is deployed on its own.

environment.py   what Ray and Serve read from the environment, with ports and folders of this instance's own
applications.py  the deployments: the ingress with the ASGI application, and replicas that host experts
handle.py        an `Expert` whose replicas are elsewhere
wire.py          what crosses a handle
hosts.py         what starts and ends it all: on Ray Serve, or on uvicorn in one process
"""
