"""`voltana report`: what a directory of results holds, as one HTML file that needs no network."""
