"""What several passes build their graphs with."""
