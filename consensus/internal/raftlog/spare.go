package raftlog

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
)

// moreSpares are kept beside the next segment's file. Groups give up their entries
// some segments at a time: a file that was deleted meanwhile would have to be filled
// with zeros again, which made the disk write everything twice.
const moreSpares = 5

// spareFile is the file of the next segment, made before it is needed: allocating it
// takes as long as some hundred records.
type spareFile struct {
	dir  string
	size int64
	log  *slog.Logger
	wg   sync.WaitGroup

	mu     sync.Mutex // guards the rest
	f      *os.File
	more   []kept // for later
	named  int    // how many files have been called so
	made   int    // how many were filled with zeros
	making bool
	closed bool
}

// kept is a file that waits under a path of its own.
type kept struct {
	f    *os.File
	path string
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
	p.mu.Lock()
	p.made++
	p.mu.Unlock()
	return allocate(p.path(), size)
}

// keep makes the spare of a segment that is not needed any more; false if it cannot
// be used. Its content does not matter: every record is bound to its segment's number.
func (p *spareFile) keep(s *segment) (bool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || s.size != p.size || len(p.more) >= moreSpares {
		return false, nil
	}
	if p.f != nil || p.making {
		p.named++
		k := kept{s.f, filepath.Join(p.dir, fmt.Sprintf("more%d%s", p.named, spareSuffix))}
		if err := os.Rename(s.path, k.path); err != nil {
			return false, err
		}
		p.more = append(p.more, k)
		return true, nil
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
	if n := len(p.more); n > 0 {
		k := p.more[n-1]
		if err := os.Rename(k.path, p.path()); err == nil {
			p.f, p.more = k.f, p.more[:n-1]
			return
		}
	}
	p.making = true
	p.made++
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
	var errs []error
	for _, k := range p.more { // the next Open deletes them
		errs = append(errs, k.f.Close())
	}
	if p.f != nil {
		errs = append(errs, p.f.Close())
	}
	return errors.Join(errs...)
}
