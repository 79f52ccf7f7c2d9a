"""What a comparison writes: measures, pictures, charts, video files, an HTML page."""
