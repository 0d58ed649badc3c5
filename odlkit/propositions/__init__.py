"""The papers' propositions, a module a paper, each played by `odlkit.certify.run`."""
