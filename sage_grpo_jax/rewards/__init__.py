"""Video rewards behind gRPC: protocol, client, server, backends."""
