"""In the request path, for WSGI and ASGI apps. Nothing here is imported by the rest."""
