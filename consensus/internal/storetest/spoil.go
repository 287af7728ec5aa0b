package storetest

import (
	"bytes"
	"errors"
	"path/filepath"
	"testing"

	bolt "go.etcd.io/bbolt"
)

// Spoil changes one letter of a value in the database of a
// replica that does not run.
func Spoil(t testing.TB, dir, value string) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "db.*"))
	if err != nil || len(names) != 1 {
		t.Fatalf("databases in %s: %v, %v", dir, names, err)
	}
	db, err := bolt.Open(names[0], 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	err = db.Update(func(tx *bolt.Tx) error {
		b := tx.Bucket([]byte("key"))
		return b.ForEach(func(k, v []byte) error {
			if i := bytes.Index(v, []byte(value)); i >= 0 {
				found++
				v = bytes.Clone(v)
				v[i] ^= 1
				return b.Put(bytes.Clone(k), v)
			}
			return nil
		})
	})
	if err = errors.Join(err, db.Close()); err != nil || found != 1 {
		t.Fatalf("%d values changed, %v", found, err)
	}
}
