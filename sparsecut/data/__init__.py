"""From files of records to batches."""
