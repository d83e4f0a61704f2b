"""What everything stands on: devices, files written whole, JSON that is checked."""
