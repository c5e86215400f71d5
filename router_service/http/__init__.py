"""The HTTP interface: a plain ASGI application in OpenAI's wire format."""
