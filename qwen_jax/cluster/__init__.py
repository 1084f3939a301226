"""Several engines behind one address: routing, trials, response cache, fraud screening, Ray Serve, and a simulator."""
