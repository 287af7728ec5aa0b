// Package exits keeps, on disk, how containers ended.
//
// CRI does not promise an exit code across a death of its own: when containerd is killed between taking a
// finished task from the shim and writing down what it took, it later reports 255 "Unknown". The shim (Skein's own
// helper executable) therefore writes a record here before it hands a finished container over, and node/cri
// reads it back. A record is written once, before the shim forgets the container, and never changes.
//
// The shim process writes, node/cri reads and removes; both may run at once. There is one file for an exit
// and one for an out-of-memory kill of each container, so that neither needs a lock.
package exits

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// DirEnv is the environment variable that tells the shim where to keep its records. Without it the shim keeps none.
const DirEnv = "SKEIN_EXIT_DIR"

// version of the format of a record.
const version = 1

const (
	exitSuffix = ".exit"
	oomSuffix  = ".oom"
)

// Record says how the first process of a container ended.
type Record struct {
	// Version of the format.
	Version int `json:"v"`
	// Status is the exit code, or 128 + signal number, as wait4 gave it to the shim.
	Status uint32 `json:"status"`
	// At is when the shim reaped the process, by this node's clock.
	At time.Time `json:"at"`
	// OOM tells that the kernel killed a process of the container for lack of memory. It is kept in a file of its own.
	OOM bool `json:"-"`
}

// ErrNone is returned by Read for a container that has no record.
var ErrNone = errors.New("no exit record")

// checkID refuses what cannot be a container id, as ids become file names.
func checkID(id string) error {
	if id == "" || len(id) > 200 || id[0] == '.' || strings.ContainsAny(id, "/\x00") {
		return fmt.Errorf("container id %q cannot name an exit record", id)
	}
	return nil
}

// Write keeps the exit of container id. It replaces a file atomically, so a reader sees all of it or nothing. It does not
// sync: a record must survive the death of processes, and after the death of the machine there is no container to speak of.
func Write(dir, id string, status uint32, at time.Time) error {
	if err := checkID(id); err != nil {
		return err
	}
	b, err := json.Marshal(Record{Version: version, Status: status, At: at.UTC()})
	if err != nil {
		return fmt.Errorf("exit record of container %s: %w", id, err)
	}
	return replace(filepath.Join(dir, id+exitSuffix), b)
}

// WriteOOM keeps that the kernel killed a process of container id for lack of memory.
func WriteOOM(dir, id string) error {
	if err := checkID(id); err != nil {
		return err
	}
	return replace(filepath.Join(dir, id+oomSuffix), nil)
}

func replace(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".tmp-")
	if err != nil {
		return fmt.Errorf("exit record: %w", err)
	}
	_, err = f.Write(b)
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("exit record %s: %w", path, err), os.Remove(f.Name()))
	}
	return nil
}

// Read gives the record of container id, or ErrNone.
func Read(dir, id string) (Record, error) {
	if err := checkID(id); err != nil {
		return Record{}, err
	}
	b, err := os.ReadFile(filepath.Join(dir, id+exitSuffix))
	if errors.Is(err, fs.ErrNotExist) {
		return Record{}, fmt.Errorf("container %s: %w", id, ErrNone)
	}
	if err != nil {
		return Record{}, fmt.Errorf("exit record of container %s: %w", id, err)
	}
	r, err := decode(b)
	if err != nil {
		return Record{}, fmt.Errorf("exit record of container %s: %w", id, err)
	}
	if r.OOM, err = OOM(dir, id); err != nil {
		return Record{}, err
	}
	return r, nil
}

func decode(b []byte) (Record, error) {
	var r Record
	if err := json.Unmarshal(b, &r); err != nil {
		return Record{}, err
	}
	if r.Version != version {
		return Record{}, fmt.Errorf("format version %d, this program knows %d", r.Version, version)
	}
	return r, nil
}

// OOM tells whether WriteOOM was called for container id.
func OOM(dir, id string) (bool, error) {
	if err := checkID(id); err != nil {
		return false, err
	}
	_, err := os.Stat(filepath.Join(dir, id+oomSuffix))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("oom record of container %s: %w", id, err)
	}
	return true, nil
}

// Remove forgets container id; no record is no error.
func Remove(dir, id string) error {
	if err := checkID(id); err != nil {
		return err
	}
	var errs []error
	for _, s := range []string{exitSuffix, oomSuffix} {
		if err := os.Remove(filepath.Join(dir, id+s)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// IDs lists the containers of which anything is kept, in no order.
func IDs(dir string) ([]string, error) {
	es, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("exit records: %w", err)
	}
	seen := make(map[string]bool, len(es))
	var ids []string
	for _, e := range es {
		id, ok := strings.CutSuffix(e.Name(), exitSuffix)
		if !ok {
			id, ok = strings.CutSuffix(e.Name(), oomSuffix)
		}
		if !ok || seen[id] || checkID(id) != nil {
			continue
		}
		seen[id] = true
		ids = append(ids, id)
	}
	return ids, nil
}
