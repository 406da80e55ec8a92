//! Bytes on the wire against an independent implementation, and against whoever means harm.

mod hostile;
mod vectors;
