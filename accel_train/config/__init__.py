"""What a run is asked to do: sections, their fields, identity, and how they are read."""
