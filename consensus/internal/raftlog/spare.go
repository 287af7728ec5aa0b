package raftlog

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
)

// spareFile is the file of the next segment, made before it is needed: allocating it
// takes as long as some hundred records.
type spareFile struct {
	dir  string
	size int64
	log  *slog.Logger
	wg   sync.WaitGroup

	mu     sync.Mutex // guards the rest
	f      *os.File
	making bool
	closed bool
}

func (p *spareFile) path() string { return filepath.Join(p.dir, "next"+spareSuffix) }

// adopt uses the spare of an earlier process, if it is one.
func (p *spareFile) adopt() error {
	f, err := os.OpenFile(p.path(), os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if st, err := f.Stat(); err != nil || st.Size() != p.size {
		return errors.Join(err, f.Close(), os.Remove(p.path()))
	}
	p.f = f
	return nil
}

// take returns a file of so many bytes, under the spare's path.
func (p *spareFile) take(size int64) (*os.File, error) {
	p.wg.Wait()
	p.mu.Lock()
	f := p.f
	p.f = nil
	p.mu.Unlock()
	if f != nil && size == p.size {
		return f, nil
	}
	if f != nil {
		if err := errors.Join(f.Close(), os.Remove(p.path())); err != nil {
			return nil, err
		}
	}
	return allocate(p.path(), size)
}

// keep makes the spare of a segment that is not needed any more; false if it cannot
// be used. Its content does not matter: every record is bound to its segment's number.
func (p *spareFile) keep(s *segment) (bool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.f != nil || p.making || p.closed || s.size != p.size {
		return false, nil
	}
	if err := os.Rename(s.path, p.path()); err != nil {
		return false, err
	}
	p.f = s.f
	return true, nil
}

// prepare makes a spare beside everything else.
func (p *spareFile) prepare() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.f != nil || p.making || p.closed {
		return
	}
	p.making = true
	p.wg.Go(func() {
		f, err := allocate(p.path(), p.size)
		p.mu.Lock()
		defer p.mu.Unlock()
		p.making = false
		if err != nil { // the log tries again when it needs one
			p.log.Warn("cannot prepare a segment of the log", "error", err)
			return
		}
		p.f = f
	})
}

func (p *spareFile) close() error {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.wg.Wait()
	if p.f == nil {
		return nil
	}
	return p.f.Close()
}
