"""What several tests share: planted data, own norms, chosen norms, how a run is stopped."""
