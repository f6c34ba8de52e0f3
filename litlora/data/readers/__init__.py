"""From a source to rows: files, addresses and data sets of the Hub, what their bytes hold, and the formats of rows."""
