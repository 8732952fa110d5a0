"""Client of an abmll server, over HTTP only: ``from clients.http import Client``."""
