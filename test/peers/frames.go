package peers

import (
	"bufio"
	"encoding/binary"
	"io"
)

// Frames hands over the events of a watch in protobuf, each still encoded, until the stream or the function ends with an error. Read is how many
// bytes are read at a time; an event is good until the function returns.
func Frames(body io.Reader, read int, event func([]byte) error) error {
	r := bufio.NewReaderSize(body, read)
	var size [4]byte
	var buf []byte
	for {
		if _, err := io.ReadFull(r, size[:]); err != nil {
			return err
		}
		n := int(binary.BigEndian.Uint32(size[:]))
		if cap(buf) < n {
			buf = make([]byte, n)
		}
		if _, err := io.ReadFull(r, buf[:n]); err != nil {
			return err
		}
		if err := event(buf[:n]); err != nil {
			return err
		}
	}
}
