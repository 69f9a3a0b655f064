"""How one step or segment depends on the state and the parameters."""
