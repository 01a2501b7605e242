"""`evaluate absorption`: first-letter absorption."""
