package keyring

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
)

// FileName is the ring's file in a node's identity directory.
const FileName = "keyring"

const newInfix = ".new-" // of a file that is being written

// ErrNone says that this node has no ring.
var ErrNone = errors.New("key ring: this node has none")

// Load reads the ring of a file; ErrNone when there is no file. Other errors name the file.
func Load(path string) (Ring, error) {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Ring{}, fmt.Errorf("%s: %w", path, ErrNone)
	}
	if err != nil {
		return Ring{}, fmt.Errorf("key ring: %w", err)
	}
	if !info.Mode().IsRegular() || info.Size() > maxEncoded {
		return Ring{}, fmt.Errorf("%s: %w: %s of %d bytes", path, ErrCorrupt, info.Mode().Type(), info.Size())
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return Ring{}, fmt.Errorf("key ring: %w", err)
	}
	r, err := Decode(b)
	if err != nil {
		return Ring{}, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

// Save replaces the file (0600) durably: a crash leaves the old ring or the new one. What the old file held is overwritten, as far
// as the file system writes in place.
func Save(path string, r Ring) error {
	wrap := func(err error) error { return fmt.Errorf("key ring %s: %w", path, err) }
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+newInfix) // 0600
	if err != nil {
		return wrap(err)
	}
	defer os.Remove(f.Name()) // finds nothing after the rename
	_, err = f.Write(r.Encode())
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return wrap(err)
	}
	// The old file stays open over the rename, so that it can be wiped once it is not needed any more.
	old, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return wrap(err)
	}
	if old != nil {
		defer old.Close()
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return wrap(err)
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return wrap(err)
	}
	if old != nil {
		if err := wipe(old); err != nil {
			return wrap(err)
		}
	}
	return nil
}

// Destroy overwrites and removes the file, and what an interrupted Save left beside it. No file is no error. Overwriting reaches the
// old bytes only where the disk and the file system write in place; it is done because it costs nothing.
func Destroy(path string) error {
	paths := []string{path}
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("key ring %s: %w", path, err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), filepath.Base(path)+newInfix) {
			paths = append(paths, filepath.Join(filepath.Dir(path), e.Name()))
		}
	}
	var errs []error
	for _, p := range paths {
		errs = append(errs, destroy(p))
	}
	return errors.Join(errs...)
}

func destroy(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("key ring: %w", err)
	}
	err = errors.Join(wipe(f), f.Close(), os.Remove(path))
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	if err != nil {
		return fmt.Errorf("key ring %s: %w", path, err)
	}
	return nil
}

func wipe(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if _, err := f.WriteAt(make([]byte, info.Size()), 0); err != nil {
		return err
	}
	return f.Sync()
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Holder is the ring of this node. Make it with NewHolder.
type Holder struct {
	path string

	update sync.Mutex // orders changes; held while the file is written

	mu      sync.RWMutex // guards ring and changed
	ring    Ring
	changed chan struct{}
}

// NewHolder loads the ring of a file; without a file the holder is empty. Leftovers of an interrupted write are removed.
func NewHolder(path string) (*Holder, error) {
	h := &Holder{path: path, changed: make(chan struct{})}
	left, err := filepath.Glob(path + newInfix + "*")
	if err != nil {
		return nil, fmt.Errorf("key ring: %w", err)
	}
	for _, p := range left {
		if err := destroy(p); err != nil {
			return nil, err
		}
	}
	if h.ring, err = Load(path); err != nil && !errors.Is(err, ErrNone) {
		return nil, err
	}
	return h, nil
}

// Ring is the ring now, empty if this node has none, and a channel that closes when it changes.
func (h *Holder) Ring() (Ring, <-chan struct{}) {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return h.ring, h.changed
}

// Update changes the ring. f gets the present ring and returns the new one; the file holds it before Update returns and before anybody
// sees it. A result that equals the present ring writes nothing. Updates follow each other.
func (h *Holder) Update(f func(Ring) (Ring, error)) (Ring, error) {
	h.update.Lock()
	defer h.update.Unlock()
	before, _ := h.Ring()
	after, err := f(before)
	if err != nil || after.Equal(before) {
		return before, err
	}
	if err := Save(h.path, after); err != nil {
		return before, err
	}
	h.set(after)
	return after, nil
}

// Destroy forgets the ring and destroys its file.
func (h *Holder) Destroy() error {
	h.update.Lock()
	defer h.update.Unlock()
	h.set(Ring{})
	return Destroy(h.path)
}

func (h *Holder) set(r Ring) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ring = r
	close(h.changed)
	h.changed = make(chan struct{})
}
