"""Reports: pure functions of records. Deleting every report loses nothing."""
