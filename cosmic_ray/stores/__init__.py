"""What lies on disk: crop stores and splits; schema, manifest, writer, reader."""
