"""What samples are made from: manifests, made and spoken speech, noise, rooms, weights."""
