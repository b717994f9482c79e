"""The servers behind the router: who answers, what they have to do, the connections to them."""
