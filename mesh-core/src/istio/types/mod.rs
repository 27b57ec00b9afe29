//! One plain struct file per kind.
