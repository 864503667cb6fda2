"""Other libraries' models with our weights, behind the interface that `Backend.compile` takes. One module a library."""
