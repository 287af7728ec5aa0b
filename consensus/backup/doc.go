// Package backup is the format of a backup file: the state of all shards of a
// cluster at one moment, what is needed to read it, and the proof that nothing of
// it is missing or changed.
//
// Contract: Write streams a file, Read streams and checks one; memory is bounded
// whatever the size. What Read hands to its caller is proven only when Read has
// returned nil. Everything that Read refuses is an *Error that names the section
// and the offset; no input makes it panic. WriteFile makes a file appear under
// its name only when all of it is on disk.
//
// Package backup knows nothing of a running store (host.Host.Cut makes what is
// written, host.Rebuild makes a store of what is read). Functions may be called
// from any goroutine.
package backup
