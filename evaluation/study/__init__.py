"""What all studies share: records, identity, settings, tables, style and pages."""
