package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"skein.io/skein/node/daemon"
)

type recoverCmd struct {
	nodeFlags
	Yes bool `help:"Do not ask."`
}

func (r *recoverCmd) Run(ctx context.Context) error {
	c, err := r.config()
	if err != nil {
		return err
	}
	r.quiet(&c)
	return daemon.Recover(ctx, c, daemon.RecoverOptions{Out: os.Stdout, Confirm: func(question string) (bool, error) {
		if r.Yes {
			return true, nil
		}
		fmt.Printf("\n%s Type yes: ", question)
		answer, err := bufio.NewReader(os.Stdin).ReadString('\n')
		if err != nil && answer == "" {
			return false, errors.New("recover: nobody answers; --yes goes on without asking")
		}
		return strings.TrimSpace(answer) == "yes", nil
	}})
}
